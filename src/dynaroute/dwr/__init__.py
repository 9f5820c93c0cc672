"""Dynamic weight retrieval: the Mixture-of-Experts model, its expert store and cached inference."""
