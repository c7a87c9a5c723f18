"""Interactive video corpus retrieval in JAX."""
