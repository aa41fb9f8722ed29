"""What people give: annotations, boxes, photographs, videos. Imports nothing here on purpose."""
