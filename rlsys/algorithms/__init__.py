"""Pure tensor maths: advantages, policy losses, KL, aggregation, objectives, schedules."""
