"""The bundle folder: what its manifest says, how its cache is laid out, how it is opened."""
