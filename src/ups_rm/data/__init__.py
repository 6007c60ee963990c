"""SafeRLHF rows in, verl's prompt parquet out; statistics, checks, and the packaged sample."""
