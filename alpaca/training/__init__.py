"""Fine-tuning: from flags to a saved and checked model."""
