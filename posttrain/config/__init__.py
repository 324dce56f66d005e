"""Recipes: schema, loading, overrides and preflight arithmetic. Importing this package loads no torch."""
