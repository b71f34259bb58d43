//! Instruction sets, found at run time, and the one place that chooses between the versions of a kernel.

/// An instruction set that this machine has. A value can't be made for one that it lacks, so having one is the
/// permission to call that set's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Isa(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The best of this machine.
    #[must_use]
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                return Self(Kind::Avx512);
            }
            if has_avx2() {
                return Self(Kind::Avx2);
            }
        }
        Self(Kind::Scalar)
    }

    /// All that this machine has, the plain one first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self(Kind::Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(has_avx2().then_some(Self(Kind::Avx2)));
            all.extend(has_avx512().then_some(Self(Kind::Avx512)));
        }
        all
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512-vnni",
        }
    }

    pub(super) fn kind(self) -> Kind {
        self.0
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
}

/// Compiles `body`, a generic function over [`Simd`](super::simd::Simd) that takes a set as its first argument and must
/// be `#[inline(always)]`, once for each set, as a function that takes an [`Isa`]. The compiler may use wider registers
/// for the plain parts of `body`; it may not change a result, because Rust has no fast-math: `mul_add` is one rounding
/// everywhere, and nothing else is ever fused or reordered.
macro_rules! versions {
    ($vis:vis fn $name:ident$(<$($generic:ident: $bound:path),*>)?($($arg:ident: $ty:ty),* $(,)?) = $body:expr;) => {
        $vis fn $name$(<$($generic: $bound),*>)?(isa: $crate::kernels::isa::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2$(<$($generic: $bound),*>)?(simd: $crate::kernels::simd::Avx2, $($arg: $ty),*) {
                $body(simd, $($arg),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            fn avx512$(<$($generic: $bound),*>)?(simd: $crate::kernels::simd::Avx512, $($arg: $ty),*) {
                $body(simd, $($arg),*);
            }
            #[cfg(target_arch = "x86_64")]
            if let Some(simd) = $crate::kernels::simd::Avx512::of(isa) {
                // SAFETY: this value exists only where the features were detected.
                return unsafe { avx512$(::<$($generic),*>)?(simd, $($arg),*) };
            }
            #[cfg(target_arch = "x86_64")]
            if let Some(simd) = $crate::kernels::simd::Avx2::of(isa) {
                // SAFETY: as above.
                return unsafe { avx2$(::<$($generic),*>)?(simd, $($arg),*) };
            }
            let _ = isa;
            $body($crate::kernels::simd::Plain, $($arg),*);
        }
    };
}
pub(super) use versions;
