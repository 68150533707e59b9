"""From logits to text: tokens are chosen, and shown as soon as no later one can change them."""
