"""Random calls against an independent float64 reference: ``python tests/fuzz.py`` runs them."""
