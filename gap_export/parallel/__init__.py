"""Tasks dealt to processes of this machine, or to a Ray cluster."""
