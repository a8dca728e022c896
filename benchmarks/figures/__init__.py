"""The figures that the pages show: kept from runs, made into tables and pictures."""
