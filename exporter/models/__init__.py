"""One folder a model; registry.py lists them."""
