"""General ability by lm-evaluation-harness: any of its tasks, before and after editing."""
