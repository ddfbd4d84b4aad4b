"""Concept unlearning in a small text-to-image model: what is forgotten, the methods, and their measurement."""
