"""Studies: several methods over several seeds at one budget, from one file. Order: schema, plan, running, study."""
