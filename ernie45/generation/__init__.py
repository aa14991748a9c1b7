"""From logits to text: sampling, beam search and streaming."""
