"""When things happen in a run: milestones, the run folder, progress."""
