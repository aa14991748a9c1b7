"""From messages with pictures and videos to the inputs of a vision-language model."""
