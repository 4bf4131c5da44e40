//! Where a chunkserver's data is: a folder, or a file system on an image that can lose power and turn bad.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::image::Image;

pub enum Disk {
    Plain(PathBuf),
    Image(Box<Image>),
}

impl Disk {
    /// The chunkserver makes the folder.
    pub fn plain(folder: &Path) -> Self {
        Self::Plain(folder.to_owned())
    }

    pub fn image(folder: &Path, bytes: u64, seed: u64) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        Ok(Self::Image(Box::new(Image::new(folder, bytes, seed)?)))
    }

    pub fn data_dir(&self) -> PathBuf {
        match self {
            Self::Plain(folder) => folder.clone(),
            Self::Image(image) => image.data_dir(),
        }
    }

    /// The image, for faults that were listed only because there is one.
    pub fn of_image(&mut self) -> Option<&mut Image> {
        match self {
            Self::Plain(_) => None,
            Self::Image(image) => Some(image),
        }
    }
}
