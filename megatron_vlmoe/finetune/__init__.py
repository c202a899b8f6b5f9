"""Fine-tuning on downstream tasks: metrics, mixing, predictions and reports."""
