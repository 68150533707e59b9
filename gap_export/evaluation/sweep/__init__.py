"""Many pruners at many ratios in one table."""
