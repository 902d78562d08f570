//! Devices at I/O ports that PCs have always had.

pub mod i8042;
pub mod serial;

pub use i8042::{I8042, I8042State};
pub use serial::{Serial, SerialError, SerialState};

use std::io;
use std::sync::Arc;

use crate::InterruptLine;

/// Our interrupt line, as vm-superio wants it.
#[derive(Clone)]
struct Line(Arc<dyn InterruptLine>);

impl vm_superio::Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}
