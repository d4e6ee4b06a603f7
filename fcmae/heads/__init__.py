"""Heads that make maps of classes of an encoder's pyramid; knows no images, masks or files."""
