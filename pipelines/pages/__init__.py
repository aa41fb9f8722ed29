"""What a person looks at: sheets of pictures, pages, figures. Imports nothing here on purpose."""
