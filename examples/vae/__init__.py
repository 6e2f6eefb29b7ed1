"""The reference VAE: encoder, two parallel heads, decoder, trained on handwritten digits."""
