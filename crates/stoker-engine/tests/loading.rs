//! What a model's manifest can get wrong, and what of it the arithmetic depends on.
#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

mod support;

use std::sync::Arc;

use stoker_checkpoint::{Manifest, Part, Role, RopeScaling, Tensor};
use stoker_engine::{EngineError, EngineLimits, Model, Places, Region, Threads, WeightError, load_model};
use stoker_types::DType;
use support::{Checkpoint, LIMITS, Random, data, logits_from};

fn load(checkpoint: &Checkpoint, limits: &EngineLimits) -> Result<Box<dyn Model>, EngineError> {
    let threads = Arc::new(Threads::new(1).unwrap());
    load_model(&checkpoint.manifest, Places::Files(&checkpoint.regions), threads, limits)
}

fn changed(change: impl FnOnce(&mut Manifest)) -> EngineError {
    let mut checkpoint = Checkpoint::read(&data("tiny-llama3"));
    change(&mut checkpoint.manifest);
    match load(&checkpoint, &LIMITS) {
        Ok(_) => panic!("it was loaded"),
        Err(error) => error,
    }
}

fn tensor(manifest: &mut Manifest, role: Role) -> &mut Tensor {
    manifest.tensors.iter_mut().find(|tensor| tensor.role == Some(role)).unwrap()
}

const QUERY: Role = Role::Layer(1, Part::Query);

#[test]
fn errors_name_the_tensor_its_type_and_its_shape() {
    let error = changed(|m| tensor(m, QUERY).role = None);
    assert!(matches!(error, EngineError::MissingTensor { role: QUERY }), "{error}");

    let error = changed(|m| tensor(m, QUERY).shape.reverse());
    let EngineError::Shape { tensor: name, dtype: DType::F32, expected, found } = &error else {
        panic!("{error}")
    };
    assert_eq!((&expected[..], &found[..]), (&[128, 64][..], &[64, 128][..]));
    assert!(error.to_string().contains(name) && error.to_string().contains("F32"), "{error}");

    let error = changed(|m| tensor(m, QUERY).dtype = DType::IQ4_XS);
    assert!(
        matches!(&error, EngineError::Tensor { source: WeightError::UnsupportedType { .. }, .. }),
        "{error}"
    );
    let error = changed(|m| tensor(m, QUERY).len -= 1);
    assert!(matches!(&error, EngineError::Tensor { source: WeightError::WrongLength { .. }, .. }), "{error}");
    let error = changed(|m| tensor(m, QUERY).offset = u64::MAX);
    assert!(matches!(&error, EngineError::Tensor { source: WeightError::OutOfRegion { .. }, .. }), "{error}");
    assert!(error.not_runnable());

    let error = changed(|m| tensor(m, QUERY).file = 3);
    assert!(matches!(&error, EngineError::MissingRegion { file: 3, regions: 1, .. }), "{error}");
    assert!(!error.not_runnable());
}

#[test]
fn a_configuration_that_can_not_be_computed_is_refused() {
    let refused = changed(|m| m.refusal = Some("a reason".to_owned()));
    assert_eq!(refused.to_string(), "not runnable: a reason");
    assert!(matches!(changed(|m| m.config = None), EngineError::Refused { .. }));

    let wrong: [fn(&mut Manifest); 8] = [
        |m| m.config.as_mut().unwrap().kv_heads = 3,
        |m| m.config.as_mut().unwrap().kv_heads = 0,
        |m| m.config.as_mut().unwrap().heads = 4 * 65,
        |m| m.config.as_mut().unwrap().rope.dims = 34,
        |m| m.config.as_mut().unwrap().rope.theta = 0.0,
        |m| m.config.as_mut().unwrap().norm_epsilon = f32::NAN,
        |m| m.config.as_mut().unwrap().sliding_window = Some(0),
        // Biases that are there and would not be used.
        |m| m.config.as_mut().unwrap().attention_bias = false,
    ];
    for (case, change) in wrong.into_iter().enumerate() {
        let error = changed(change);
        assert!(matches!(error, EngineError::Config { .. }) && error.not_runnable(), "{case}: {error}");
    }

    let checkpoint = Checkpoint::read(&data("tiny-llama"));
    let error = load(&checkpoint, &EngineLimits { context: 513, ..LIMITS }).err().unwrap();
    assert!(error.to_string().contains("above the trained length of 512"), "{error}");
}

#[test]
fn rope_frequencies_of_a_gguf_divide() {
    let text = Random(1).ids(40, 259);
    let mut linear = Checkpoint::read(&data("tiny-llama"));
    let config = linear.manifest.config.as_mut().unwrap();
    config.rope.scaling = Some(RopeScaling::Linear { factor: 4.0 });

    let mut divided = Checkpoint::read(&data("tiny-llama"));
    divided.regions.push(Arc::new([4.0_f32; 8].iter().flat_map(|f| f.to_le_bytes()).collect::<Vec<u8>>()));
    let file = divided.manifest.files[0].clone();
    divided.manifest.files.push(file);
    divided.manifest.tensors.push(Tensor {
        name: "rope_freqs.weight".to_owned(),
        role: Some(Role::RopeFreqs),
        dtype: DType::F32,
        shape: vec![8],
        file: 1,
        offset: 0,
        len: 32,
    });
    let mut logits = [linear, divided, Checkpoint::read(&data("tiny-llama"))]
        .map(|checkpoint| logits_from(&mut *checkpoint.model(1), &text, 0));
    let plain = logits[2].split_off(1);
    assert_eq!(logits[0], logits[1]);
    assert_ne!(logits[0][1..], plain[..]);
}

#[test]
fn tensors_may_lie_anywhere_in_one_region() {
    let checkpoint = Checkpoint::read(&data("tiny-llama3"));
    let manifest = &checkpoint.manifest;
    let threads = || Arc::new(Threads::new(1).unwrap());
    // Backwards, with gaps.
    let (mut slab, mut offsets) = (Vec::new(), vec![0; manifest.tensors.len()]);
    for (i, tensor) in manifest.tensors.iter().enumerate().rev() {
        slab.extend([0xAA; 13]);
        offsets[i] = slab.len() as u64;
        let begin = usize::try_from(tensor.offset).unwrap();
        let file = checkpoint.regions[tensor.file as usize].bytes();
        slab.extend_from_slice(&file[begin..begin + usize::try_from(tensor.len).unwrap()]);
    }
    let region: Arc<dyn Region> = Arc::new(slab);
    let places = Places::Slab { region: &region, offsets: &offsets };
    let mut model = load_model(manifest, places, threads(), &LIMITS).unwrap();
    let mut from_files =
        load_model(manifest, Places::Files(&checkpoint.regions), threads(), &LIMITS).unwrap();
    let tokens = [1, 5, 9, 2];
    assert_eq!(logits_from(&mut *model, &tokens, 0), logits_from(&mut *from_files, &tokens, 0));

    let places = Places::Slab { region: &region, offsets: &offsets[..1] };
    let Err(error) = load_model(manifest, places, threads(), &LIMITS) else { panic!("it was loaded") };
    assert!(matches!(&error, EngineError::MissingOffset { offsets: 1, .. }), "{error}");
    assert!(!error.not_runnable());
}
