//! What operators ask of a host goes to the machine they name.

use super::Host;
use crate::{
    base::ids::{Lineage, Name},
    node::{
        control::{
            CancelReport, CancelRequest, ExportReport, FailoverReport, FailoverRequest,
            FolderRequest, ImportReport, Operate, OperateError, ResizeReport, ResizeRequest,
            ReverseRequest, SuspendReport, SuspendRequest, TestRequest, VerifyRequest,
        },
        status::{NodeStatus, PointStatus, TestStatus},
    },
};

impl Operate for Host {
    fn status(&self) -> NodeStatus {
        NodeStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            listening: self.address,
            at: self.shared.clock.wall(),
            machines: self.all().iter().map(|member| member.status()).collect(),
            coordinates: Vec::new(),
        }
    }

    fn cut(&self, machine: &Name) -> Result<Lineage, OperateError> {
        match self.asked(machine)?.serving() {
            Some(serving) => serving.primary.cut_now(),
            None => Err(OperateError::NoSuchMachine(machine.clone())),
        }
    }

    fn resync(&self, machine: &Name) -> Result<(), OperateError> {
        match self.asked(machine)?.serving() {
            Some(serving) => serving.primary.resync_now(),
            None => Err(OperateError::NoSuchMachine(machine.clone())),
        }
    }

    fn verify(&self, machine: &Name, request: VerifyRequest) -> Result<(), OperateError> {
        match self.asked(machine)?.serving() {
            Some(serving) => serving.primary.verify_now(request),
            None => Err(OperateError::NoSuchMachine(machine.clone())),
        }
    }

    fn points(&self, machine: &Name) -> Result<Vec<PointStatus>, OperateError> {
        Ok(self.asked(machine)?.replica()?.points())
    }

    fn start_test(&self, machine: &Name, request: TestRequest) -> Result<TestStatus, OperateError> {
        self.asked(machine)?.start_test(request)
    }

    fn failover(
        &self,
        machine: &Name,
        request: FailoverRequest,
    ) -> Result<FailoverReport, OperateError> {
        self.asked(machine)?.failover(&request)
    }

    fn commit(&self, machine: &Name) -> Result<FailoverReport, OperateError> {
        self.asked(machine)?.commit()
    }

    fn cancel(&self, machine: &Name, request: CancelRequest) -> Result<CancelReport, OperateError> {
        self.asked(machine)?.cancel(request)
    }

    fn reverse(
        &self,
        machine: &Name,
        request: ReverseRequest,
    ) -> Result<FailoverReport, OperateError> {
        self.asked(machine)?.reverse(request)
    }

    fn suspend(
        &self,
        machine: &Name,
        request: SuspendRequest,
    ) -> Result<SuspendReport, OperateError> {
        self.asked(machine)?.suspend(request)
    }

    fn resume(&self, machine: &Name) -> Result<SuspendReport, OperateError> {
        self.asked(machine)?.resume()
    }

    fn copy(&self, machine: &Name) -> Result<(), OperateError> {
        self.asked(machine)?.copy_now()
    }

    fn export(
        &self,
        machine: &Name,
        request: &FolderRequest,
    ) -> Result<ExportReport, OperateError> {
        match self.asked(machine)?.serving() {
            Some(serving) => serving.primary.export(&request.folder),
            None => Err(OperateError::NoSuchMachine(machine.clone())),
        }
    }

    fn import(
        &self,
        machine: &Name,
        request: &FolderRequest,
    ) -> Result<ImportReport, OperateError> {
        self.asked(machine)?.import(&request.folder)
    }

    fn resize(
        &self,
        machine: &Name,
        request: &ResizeRequest,
    ) -> Result<ResizeReport, OperateError> {
        self.asked(machine)?.resize(request)
    }
}
