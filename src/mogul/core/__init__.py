"""What every room leans on: errors, units, registries, tables, files, progress. No numpy, no torch."""
