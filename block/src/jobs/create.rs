//! Making an image: blockdev-create.

use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Control, Operation};
use crate::graph::{Graph, ImageFile, check_host_name};
use crate::qcow2::create::{CreateOptions, create};
use crate::storage::{FileOptions, FileStorage, Storage};
use crate::{Error, FileCreateOptions, Result, create_raw};

/// QAPI's `BlockdevCreateOptions`, as far as there are drivers for it.
#[derive(Debug)]
enum Options {
    /// A host file of a size: a raw image, or what another image is made in.
    File(FileCreateOptions),
    /// A qcow2 image in files that are there.
    Qcow2 { file: Value, data_file: Option<Value>, options: Box<CreateOptions> },
}

/// Makes an image. What failed midway is left as it is, and is no image.
pub struct Create {
    graph: Arc<Graph>,
    options: Options,
}

impl Create {
    /// An image of these options, whose types were checked.
    ///
    /// # Errors
    /// There is no such driver, or it makes no images.
    pub fn new(graph: &Arc<Graph>, mut options: Map<String, Value>) -> Result<Self> {
        let driver = options.remove("driver");
        let options = match driver.as_ref().and_then(Value::as_str) {
            Some("file") => Options::File(read(options)?),
            Some("qcow2") => Options::Qcow2 {
                file: options.remove("file").unwrap_or_default(),
                data_file: options.remove("data-file"),
                options: Box::new(read(options)?),
            },
            _ => {
                let text = "Driver does not support blockdev-create".to_owned();
                return Err(Error::Invalid(text));
            }
        };
        Ok(Self { graph: Arc::clone(graph), options })
    }
}

fn read<T: for<'de> Deserialize<'de>>(options: Map<String, Value>) -> Result<T> {
    T::deserialize(Value::Object(options)).map_err(|error| Error::Invalid(error.to_string()))
}

impl Operation for Create {
    fn run(&mut self, control: &Control) -> Result<()> {
        match &self.options {
            Options::File(options) => {
                let was_there = Path::new(&options.filename).exists();
                let made = create_raw(options, control.steps());
                if made.is_err() && !was_there {
                    // The error that counts is the one of the making.
                    let _ = std::fs::remove_file(&options.filename);
                }
                made.map(drop)
            }
            Options::Qcow2 { file, data_file, options } => {
                // Before any file is touched.
                options.validate(data_file.is_some())?;
                let file = Place::take(&self.graph, file)?;
                let data = data_file.as_ref().map(|data| Place::take(&self.graph, data));
                let data = data.transpose()?;
                if let Some(data) = &data
                    && file.is_same_file(data)?
                {
                    let text = "'file' and 'data-file' of an image have to be two files".to_owned();
                    return Err(Error::Invalid(text));
                }
                for place in [Some(&file), data.as_ref()].into_iter().flatten() {
                    // No header of an image that was there is to pass for the new one's.
                    place.storage().set_len(0)?;
                }
                let data = data.as_ref().map(Place::storage);
                create(file.storage(), data, options, control.steps())
            }
        }
    }
}

/// Where an image is made: QAPI's `BlockdevRef`.
enum Place {
    Node(ImageFile),
    File(FileStorage),
}

impl Place {
    fn take(graph: &Graph, reference: &Value) -> Result<Self> {
        match reference {
            Value::String(name) => graph.image_file(name).map(Self::Node),
            Value::Object(options) => Self::open(options),
            _ => Err(Error::Invalid(
                "Invalid parameter type for 'options.file', expected: BlockdevRef".to_owned(),
            )),
        }
    }

    /// A file by its name. One with other options is to be a node, which says what it can.
    fn open(options: &Map<String, Value>) -> Result<Self> {
        if let Some(other) =
            options.keys().find(|key| !matches!(key.as_str(), "driver" | "filename"))
        {
            return Err(Error::NotSupported(format!(
                "Option '{other}' of an image's file is not supported here; open it with \
                 blockdev-add and give its node's name"
            )));
        }
        let text = |key: &str| options.get(key).and_then(Value::as_str);
        match (text("driver"), text("filename")) {
            (Some(driver @ ("file" | "host_device")), Some(name)) => {
                check_host_name(name, driver == "host_device")?;
                FileStorage::open(name, FileOptions::default()).map(Self::File)
            }
            _ => Err(Error::Invalid(
                "An image's file is the name of a node, or driver 'file' or 'host_device' and a \
                 filename"
                    .to_owned(),
            )),
        }
    }

    /// Whether both are one file of the host, by whatever nodes and names.
    fn is_same_file(&self, other: &Self) -> Result<bool> {
        match (self.storage().file(), other.storage().file()) {
            (Some(file), Some(other)) => file.is_same_file(other),
            _ => Ok(false),
        }
    }

    fn storage(&self) -> &dyn Storage {
        match self {
            Self::Node(file) => &*file.storage,
            Self::File(file) => file,
        }
    }
}
