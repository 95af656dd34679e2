"""What every room leans on: errors, units, registries, tables, files, progress."""
