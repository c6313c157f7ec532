"""Text to tokens to ArrayRecord, and from there to batches: mix, pack, shard, resume."""
