"""Referring expression comprehension: data sets, protocols, runs, comparisons."""
