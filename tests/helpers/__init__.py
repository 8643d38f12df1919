"""What several tests share: traced nets, compiled nets, and checks of them."""
