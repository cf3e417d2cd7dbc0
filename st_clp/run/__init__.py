"""The whole method as one run, its forecast, ablations, and their parts."""
