"""What is left of edits after the edited model is fine-tuned: questions, arms, remedies."""
