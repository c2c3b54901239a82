"""The base model and how it is run: read, cut into layers, batched, adapted, written with."""
