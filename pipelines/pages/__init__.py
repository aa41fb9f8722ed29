"""What a person looks at: sheets of pictures, pages, curves. Imports nothing here on purpose."""
