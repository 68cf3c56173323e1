"""Everything distributed and durable: recipes, tables, training engine, runs, registry."""
