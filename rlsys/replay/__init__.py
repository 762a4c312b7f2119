"""What the loss channels beside the policy gradient learn from: teacher contexts and preference pairs."""
