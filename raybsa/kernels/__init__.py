"""Block-sparse attention: one call, several backends that give the same numbers."""
