"""The contract that every method keeps, as code: the project's tests and `posttrain contract` run the same checks.

Nothing here names a method. What a check needs to know it asks the method for: its shell, its needs, the responses and
columns of its rows.
"""
