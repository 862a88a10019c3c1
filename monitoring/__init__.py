"""What the lab measures about itself: metric definitions, and the dashboards and rules built from them."""
