"""Grids of runs: each a folder that is not made again, one table and one page of all."""
