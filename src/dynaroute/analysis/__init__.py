"""Negative log-likelihood and what else is measured on trained models."""
