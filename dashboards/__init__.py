"""Pictures of what was measured: Parquet in, one self-contained HTML page out."""
