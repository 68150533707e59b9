"""Pruners that drop tokens between the layers of the decoder."""
