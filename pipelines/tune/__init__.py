"""Fine-tuning: data -> packing -> sft -> adapter, with the chat template locked on the way."""
