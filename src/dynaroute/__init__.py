"""dynaroute: dynamic weight retrieval and DAG-wired attention as one reproducible pipeline."""
