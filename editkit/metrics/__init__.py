"""Scorers, intervals and the one evaluator."""
