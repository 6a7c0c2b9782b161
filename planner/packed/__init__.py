"""Planning of packed steps: micro-batches of whole sequences end to end, without buckets."""
