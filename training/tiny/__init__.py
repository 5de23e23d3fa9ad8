"""The tiny preset: speech, tokenizer, encoder and language model made from nothing in a few minutes ("stage 0")."""
