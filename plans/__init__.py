"""Plans: patterns, tiles, tables, the plan file; numpy only."""
