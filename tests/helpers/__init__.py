"""What several tests share: models, problems, definitions by hand, stored jobs."""
