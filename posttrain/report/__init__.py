"""The report of runs: one HTML file that opens anywhere and asks for nothing."""
